"""Detection: COCO Mask R-CNN and VOC Faster R-CNN from a backbone."""
